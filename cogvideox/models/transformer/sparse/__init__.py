"""Block-sparse attention: frames of whole tiles, patterns of tiles, and the kernel that goes over them.

Off by default. A pattern is exact in what it says, softmax over the tiles that it names; what that does to a video is
not known here.
"""
