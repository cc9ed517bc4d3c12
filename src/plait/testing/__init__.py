"""plait.testing"""
