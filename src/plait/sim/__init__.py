"""One seeded simulation of the whole network, made of the production cores.

Everything happens in one thread under virtual time; a seed decides all that is left to
chance, so that a failure is repeated by its seed. ``docs/simulator.md`` says what is real
here and what is modelled.
"""
