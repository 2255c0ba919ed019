"""codec: weights as bytes: quantise, Huffman-code, check."""
