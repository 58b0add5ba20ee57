"""`megarlx doctor`: what is there, what is not, and the command that mends it.

Only the standard library is imported here: the doctor has to run where everything else is broken.
"""
