package image

// InitRepositoryWith is InitRepository with a source of randomness.
var InitRepositoryWith = initRepository
