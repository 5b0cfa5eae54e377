# SPDX-License-Identifier: MIT
"""The tiny trained Mixture-of-Experts model: the measuring stick of everything that changes what is computed."""
