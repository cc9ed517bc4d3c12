"""plait.model"""
