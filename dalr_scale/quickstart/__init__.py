"""The embedded default: drawn scenes, their captions, and small teachers trained on them."""
