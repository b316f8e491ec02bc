"""Measure how near the frames of a video are to those of another: PSNR, and SSIM as Wang et al. (2004) define it."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SIGMA, RADIUS = 1.5, 5  # in pixels, of the Gaussian window of 11 x 11
LARGEST = 255.0
LUMINANCE, CONTRAST = (0.01 * LARGEST) ** 2, (0.03 * LARGEST) ** 2  # C1 and C2 of the paper


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite if all values are equal.

    Args:
        frames, reference: uint8 [frames, height, width, 3].
    """
    pairs = zip(frames, reference, strict=True)
    error = np.mean([np.square(ours.astype(np.float64) - theirs).mean() for ours, theirs in pairs])
    return 10 * math.log10(LARGEST**2 / error) if error else math.inf


def ssim(frames: np.ndarray, reference: np.ndarray) -> float:
    """Return the structural similarity: the mean over frames, colours and all windows that lie in a frame.

    Args:
        frames, reference: uint8 [frames, height, width, 3], at least 11 pixels high and wide.
    """
    with ThreadPoolExecutor() as threads:
        return float(np.mean([*threads.map(_ssim, frames, reference)]))


def _ssim(frame: np.ndarray, reference: np.ndarray) -> float:
    """Return the structural similarity of one frame."""
    from scipy.ndimage import gaussian_filter  # jax brings scipy

    def mean(x: np.ndarray) -> np.ndarray:
        found = gaussian_filter(x, SIGMA, radius=RADIUS, axes=(0, 1))
        return found[RADIUS:-RADIUS, RADIUS:-RADIUS]

    x, y = frame.astype(np.float64), reference.astype(np.float64)
    of_x, of_y = mean(x), mean(y)
    products, squares = of_x * of_y, of_x**2 + of_y**2
    covariance, variances = mean(x * y) - products, mean(x**2 + y**2) - squares
    similar = (2 * products + LUMINANCE) * (2 * covariance + CONTRAST)
    return float((similar / ((squares + LUMINANCE) * (variances + CONTRAST))).mean())
