"""Taps query and key of chosen layers of a transformers model, under any attention backend."""

from tokenweights.capture.captured import CapturedAttention as CapturedAttention
from tokenweights.capture.layers import attention_layers as attention_layers
from tokenweights.capture.layers import middle_layer as middle_layer
from tokenweights.capture.tap import AttentionCapture as AttentionCapture
from tokenweights.capture.tap import capture_attention as capture_attention
