"""Models: weights files, manifests, tokenizers, and the catalogue of what can be had."""
