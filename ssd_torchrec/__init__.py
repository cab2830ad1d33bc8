"""State-space sequential recommendation on TorchRec: jagged encoders, sharded tables, training and serving."""
