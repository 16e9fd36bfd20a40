"""Raw captions, images and text into shards."""
