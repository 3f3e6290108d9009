"""AudioMAR, the bidirectional topline of the paper's tables 3 and 6."""

from mllm_audio.audiomar.decode import decode_order
from mllm_audio.audiomar.model import ARCHITECTURE, AudioMAR
from mllm_audio.audiomar.network import AudioMARConfig

__all__ = ["ARCHITECTURE", "AudioMAR", "AudioMARConfig", "decode_order"]
