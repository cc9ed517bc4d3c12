"""plait.ledger/service"""
