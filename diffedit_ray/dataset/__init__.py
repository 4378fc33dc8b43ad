"""The files: manifests, storage, images, records. No torch, no Ray."""
