"""SGLang's prefix cache, less the entries that cost more than they save.

Only SGLang imports this module.
"""

from typing import Any

from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

# An entry costs 0.2 ms of Python whatever it holds, and every request makes two; to compute these
# tokens again, in a batch with others, costs a small model less.
WORTH = 64


class FrugalRadixCache(UnifiedRadixCache):
    """Shares prefixes as ever, but takes in nothing that adds less than ``WORTH`` tokens to it:
    short prompts, and short answers to long prompts."""

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        if up_to - req.kv.cache_protected_len >= WORTH:
            super().checkpoint(req, up_to=up_to, **kwargs)


def build(context: TreeCacheBuildContext) -> Any:
    """The cache of one server. Models that keep more than keys and values of whole contexts in it
    have SGLang's own: they hand over state there that must not be left behind."""
    if context.is_hybrid_swa or context.is_hybrid_ssm or context.enable_hierarchical_cache:
        return default_radix_cache_factory(context)
    return create_unified_radix_cache(context, cache_class=FrugalRadixCache)
