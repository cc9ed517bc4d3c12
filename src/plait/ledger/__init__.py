"""plait.ledger"""
