"""The benchmark suite: a module for each op, and for whole stages. `flowkernels bench` runs it (flowkernels/bench.py).

Each has `cases(device)`, which names the pieces of work; a case makes its inputs when it is its turn.
"""
