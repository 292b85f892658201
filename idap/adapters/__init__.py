"""What is known about modules of particular libraries, apart from the channels they make.

``attention``: which attributes of an attention module speak of its heads. ``multihead``: a
``torch.nn.MultiheadAttention`` whose heads can be removed one by one.
"""
