//! The hierarchy of depth discretisations: levels, cosets, transfer operators, coherence, optimizer-state transfer.
