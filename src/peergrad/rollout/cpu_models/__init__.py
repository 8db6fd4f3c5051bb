"""The model classes of SGLang that a CPU server imports; see ``trained``.

SGLang imports the modules of this package (``SGLANG_EXTERNAL_MODEL_PACKAGE``) before those of its
own two hundred model files, and those only for an architecture that is not found here: 3 s of a
core.
"""
