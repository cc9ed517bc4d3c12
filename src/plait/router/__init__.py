"""plait.router"""
