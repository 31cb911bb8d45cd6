"""From text on disk to batches: `corpus` finds and reads text, `shards` keeps it as token files,
`batches` says which tokens a step sees. Nothing here imports torch."""
