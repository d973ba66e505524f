"""The benchmark suite, which `flowkernels bench` runs (flowkernels/bench/).

A module here is an entry, of the op that it is named for or of what spans several. It has `cases(device)`, which names
the pieces of work; a case makes its inputs when it is its turn. The folder quality/ is `flowkernels bench quality`.
"""
