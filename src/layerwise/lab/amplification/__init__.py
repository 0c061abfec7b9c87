"""The demo of gradient amplification: does doubling the gradients of chosen layers in some epochs help?"""
