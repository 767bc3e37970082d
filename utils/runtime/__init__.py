"""The machinery of the stages: flags, files, resumable passes, processes. Nothing here knows about CLIP."""
