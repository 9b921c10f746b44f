"""Recurrent cells with a recurrent matrix for each head: sLSTM, LSTM, GRU and the Elman cell."""
