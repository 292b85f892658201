"""What is known about modules of particular libraries, apart from the channels they make.

``attention``: which attributes of an attention module speak of its heads. ``multihead``: a
``torch.nn.MultiheadAttention`` whose heads can be removed one by one. ``position_bias``: T5's attention, whose
layers share one table of biases. ``shuffle``: units that shuffle their channels, as ShuffleNetV2's. ``diffusers``:
attributes of its samplers. ``detection``: outputs of detectors, whose lengths depend on the image. ``standin``: how
``position_bias`` and ``shuffle`` change the class of a module in place.
"""
