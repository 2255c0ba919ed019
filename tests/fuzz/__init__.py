"""A fuzzer of the ops: calls from the contract's samples, valid or mutated, on memory that ends at a guard page.

``targets`` says what is called, ``mutate`` makes a call of a seed and a number, ``guarded`` gives its tensors memory,
``worker`` makes the calls in fresh processes, ``run`` gives them out and reports. guard_malloc.c puts what the ops
allocate themselves at guard pages as well. ``memory`` looks for bytes that an op keeps of each call.
"""
