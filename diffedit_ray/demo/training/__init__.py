"""How the embedded model is trained: scenes in, a diffusers folder out."""
