"""The objective as pure functions: tensors and floats in, tensors out, no ranks and no config.

Legend: ``G`` rollouts of one group, ``B`` rollouts of one optimizer step (over all ranks), ``T``
packed tokens of a micro-batch, ``S`` scored tokens of a micro-batch (the response tokens that
count).
"""
