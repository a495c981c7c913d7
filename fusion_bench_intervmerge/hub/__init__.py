"""Saved models on a hub: their card, pushing, and fetching."""
