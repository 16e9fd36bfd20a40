"""A training session: what it is built of, its loop, its log and its end."""
