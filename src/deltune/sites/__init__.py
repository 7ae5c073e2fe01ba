"""Addressing: which places of a model a delta acts on."""
