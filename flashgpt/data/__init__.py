"""From text on disk to batches, in the order of the data.

`files` finds what `data.source` names, `corpus` and `jsonl` read text, `encode` makes tokens of it,
whose parts `journal` keeps, `foreign` takes over those of other programs; `writer` and `shards`
write and read token files, `prepare` is all of this in one call; `batches` says which tokens a step
sees. Nothing here imports torch.
"""
