"""Edits in closed form instead of trained; and a router, which is fitted in closed form too."""
