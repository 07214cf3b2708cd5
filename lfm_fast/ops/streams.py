"""The streams of the counter-based generator: one per use, so that no two uses share numbers.

Changing one changes every picture, and every resumed run. The kernels of guided_step (csrc/common/guided_step.h,
lfm_fast/kernels/triton/guided_step.py) hold STREAM_SDE a second time.
"""

STREAM_NOISE = 0
STREAM_TIME = 1
STREAM_POSTERIOR = 2
STREAM_LABEL_DROPOUT = 3
STREAM_AUGMENTATION = 4
STREAM_SDE = 5
STREAM_PROBES = 6
STREAM_DEQUANTISATION = 7
