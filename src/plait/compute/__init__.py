"""plait.compute"""
