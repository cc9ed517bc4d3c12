"""plait.testnet"""
