"""plait.client"""
