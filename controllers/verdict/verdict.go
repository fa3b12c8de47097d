// Package verdict says what stands between a request and its node.
package verdict

// Verdict is what a check found in the way, in the words of a condition. A nil one means that nothing is.
type Verdict struct {
	Reason  string // of a condition
	Message string
	Final   bool // it will not pass: the request fails
}

// Wait is a verdict of what may pass.
func Wait(reason, message string) *Verdict { return &Verdict{Reason: reason, Message: message} }

// Refuse is a verdict of what will not.
func Refuse(reason, message string) *Verdict {
	return &Verdict{Reason: reason, Message: message, Final: true}
}
