"""What a run will cost, before it is started: memory, time and bytes exchanged, from counts or measured steps."""
