"""plait.net"""
