"""SGLang's prefix cache, less what costs more than it saves.

Only SGLang imports this module.
"""

from typing import Any

from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_memory, get_serving

# An entry costs 0.2 ms of Python whatever it holds, every request makes two, and every look for one
# is 0.1 ms with the locks that follow; to compute these tokens again, in a batch with others, costs
# a small model less. Of equal prompts that come together no entry is needed: see ``cpu_copies``.
WORTH = 64


class FrugalRadixCache(UnifiedRadixCache):
    """Shares prefixes as ever, but takes in nothing that adds less than ``WORTH`` tokens to it
    (short prompts, and short answers to long prompts), and looks for nothing shorter."""

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        if up_to - req.kv.cache_protected_len >= WORTH:
            super().checkpoint(req, up_to=up_to, **kwargs)

    def match_prefix(self, params: Any) -> Any:
        if len(params.key) < WORTH:
            return self.tree_core.empty_match_result
        return super().match_prefix(params)

    def lock(self, node_id: Any, *args: Any, **kwargs: Any) -> Any:
        """None, which is nothing to unlock, for the root: nothing evicts that."""
        if node_id == self.root_node_handle():
            return None
        return super().lock(node_id, *args, **kwargs)

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        """Give back ``ranges`` of a request's row: those of whole tokens without what is only
        needed for pages and sliding windows."""
        if self.page_size > 1:
            super().free_kv_row(kv, ranges)
            return
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
        for start, end in ranges:
            if start < end:
                self.token_to_kv_pool_allocator.free(row[start:end])


def build(context: TreeCacheBuildContext) -> Any:
    """The cache of one server. Models that keep more than keys and values of whole contexts in it
    have SGLang's own, and so do servers that keep parts of it elsewhere: what they hand over there
    must not be left behind."""
    elsewhere = (
        context.enable_hierarchical_cache
        or get_memory().enable_unified_cache_external_linker
        or get_serving().enable_streaming_session
    )
    if context.is_hybrid_swa or context.is_hybrid_ssm or elsewhere:
        return default_radix_cache_factory(context)
    return create_unified_radix_cache(context, cache_class=FrugalRadixCache)
