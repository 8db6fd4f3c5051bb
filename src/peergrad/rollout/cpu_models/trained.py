"""What peergrad trains."""

from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.mistral import MistralForCausalLM
from sglang.srt.models.mixtral import MixtralForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM

EntryClass = [
    *(LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM),
    *(Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM),
]
"""Where SGLang looks."""
