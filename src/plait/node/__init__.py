"""plait.node"""
