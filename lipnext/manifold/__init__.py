"""Pure tensor functions on square orthogonal matrices, batched over leading dimensions.

A point is `X` with `X^T X = I`. A tangent direction is written in the body frame: a skew-symmetric `A`
stands for the velocity `X A`, so moving the point never requires transporting the direction.
"""
