"""Reads weights of others, and writes and publishes model folders that timm and transformers load."""
