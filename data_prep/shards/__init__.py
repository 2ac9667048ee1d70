"""The dataset on disk, format 1 (docs/format.md): written, read, cached."""
