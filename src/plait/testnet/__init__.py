"""A real network of processes on this machine: ``plait testnet``."""
