"""Whether the tensors of an HF folder are those that its config.json means: all of them, no others.

Names, shapes and precisions come from headers alone. Only a head beside tied embeddings is read, to
see whether it is their copy.
"""

import re

from peergrad.parallel.hf.config import Shape
from peergrad.parallel.hf.folder import Folder, read_folder, some
from peergrad.parallel.hf.header import FLOATS, Stored
from peergrad.parallel.hf.strict_json import shown
from peergrad.parallel.hf.tensors import EMBEDDING, HARMLESS, HEAD, tensor_shapes

ONE_MODEL = "take both from one model"
COMPLETE = "download what is missing, or take config.json and weights from one model"
UNTIED = f"{COMPLETE}; if its head is the embedding, set tie_word_embeddings to true there"
UNQUANTISED = "use the unquantised model"
QUANTISED = re.compile(
    r"(.*\.)?(qweight|qzeros|scales|g_idx|weight_(scale|scale_inv|scale_2|zero_point|packed|shape)"
    r"|(weight|bias)_format|(input|output|k|v|q)_scale|SCB|weight\.(absmax|quant_\w+|nested_\w+"
    r"|bitsandbytes_\w+|quant_state\..+))"
)
"""What GPTQ, AWQ, compressed-tensors, fp8 and bitsandbytes put beside their codes."""
CODES = ("I8", "U8", "F8", "F6", "F4")
ADAPTER = re.compile(r"(.*\.)?(lora_\w+|base_layer|modules_to_save)(\..+)?|base_model\..+")
PIECE = 16 << 20
"""Bytes compared at a time."""


def check_weights(path: str, key: str, shape: Shape, *, values: bool = True) -> Folder:
    """The folder ``path``, which errors call ``key``; ValueError unless it holds every tensor of
    ``shape`` in whole safetensors files, none that would be left unused, and none that is
    quantised.

    ``values``: also read a head beside tied embeddings (one process is enough).
    """
    folder = read_folder(path, key)
    expected = tensor_shapes(shape)
    for name, tensor in folder.tensors.items():
        if HARMLESS.fullmatch(name) is None:
            _refuse_kind(folder, name, tensor.dtype, used=name in expected)
    for name in expected:
        rule, remedy = (
            f"tensor {name} is in none of its files",
            UNTIED if name == HEAD else COMPLETE,
        )
        folder.require(name in folder.tensors, rule, remedy)
    _check_vocabulary(folder, shape)
    for name, size in expected.items():
        theirs = folder.tensors[name].shape
        rule = f"tensor {name} is {theirs}, but config.json means {size}"
        folder.require(theirs == size, rule, ONE_MODEL)
    unused = [n for n in folder.tensors if n not in expected and not HARMLESS.fullmatch(n)]
    if shape.tied and HEAD in unused:
        unused.remove(HEAD)
        if values:
            _require_copy(folder, folder.tensors[HEAD], folder.tensors[EMBEDDING])
    if unused:
        _refuse_unused(folder, unused, shape)
    return folder


def used_dtypes(folder: Folder, shape: Shape) -> set[str]:
    """The precisions of the model's tensors in safetensors' names: ``{"BF16", "F32"}``."""
    return {folder.tensors[name].dtype for name in tensor_shapes(shape)}


def _refuse_kind(folder: Folder, name: str, dtype: str, *, used: bool) -> None:
    """Tensors that tell of another kind of checkpoint, whatever else is in it."""
    rule = f"tensor {shown(name)} belongs to a quantised model"
    folder.require(QUANTISED.fullmatch(name) is None, rule, UNQUANTISED)
    rule = f"tensor {shown(name)} is stored as {shown(dtype)}, which is quantised"
    plain = dtype in FLOATS or not (used or dtype.startswith(CODES))
    folder.require(plain, rule, UNQUANTISED)
    remedy = "merge it into its base model (peft: merge_and_unload, save_pretrained)"
    rule = f"tensor {shown(name)} belongs to an adapter"
    folder.require(ADAPTER.fullmatch(name) is None, rule, remedy)


def _check_vocabulary(folder: Folder, shape: Shape) -> None:
    names = [EMBEDDING] if shape.tied else [EMBEDDING, HEAD]
    rows = {name: (*folder.tensors[name].shape, 0)[0] for name in names}
    one = len(set(rows.values())) == 1 and min(rows.values()) > 0
    remedy = f"{ONE_MODEL}, or set vocab_size to {rows[EMBEDDING]} if the weights are right"
    for name, count in rows.items():
        rule = f"tensor {name} has {count} rows, but config.json says vocab_size = {shape.vocab}"
        folder.require(count == shape.vocab, rule, remedy if one else ONE_MODEL)


def _require_copy(folder: Folder, head: Stored, embedding: Stored) -> None:
    folder.require(
        _same_bytes(head, embedding),
        f"config.json says tie_word_embeddings = true, but {HEAD} is not {EMBEDDING}",
        "set it to false there to keep that head, or remove the tensor",
    )


def _same_bytes(one: Stored, two: Stored) -> bool:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    with one.file.open("rb") as first, two.file.open("rb") as second:
        first.seek(one.start)
        second.seek(two.start)
        left = one.size
        while left > 0:
            size = min(left, PIECE)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _refuse_unused(folder: Folder, unused: list[str], shape: Shape) -> None:
    """Name the tensors that training would silently leave out, and why there is no place."""
    layers = [match for name in unused if (match := re.match(r"model\.layers\.(\d+)\.", name))]
    deeper = [match.string for match in layers if int(match[1]) >= shape.layers]
    biases = [name for name in unused if name.endswith(".bias") and name not in deeper]
    if deeper:
        rule = f"tensor {some(deeper, 1)} is of a layer that num_hidden_layers = {shape.layers} in "
        rule += "config.json leaves out"
        folder.require(False, rule, ONE_MODEL)
    if biases:
        rule = f"has a tensor {some(biases, 1)}, but the {shape.family} model of config.json has "
        folder.require(False, f"{rule}no such bias", ONE_MODEL)
    rule = f"tensor {some(unused, 1)} has no place in the {shape.family} model of config.json"
    folder.require(False, rule, "use a plain causal language model with its own config.json")
