package checkpoint

import "github.com/prometheus/client_golang/prometheus"

// NewWaits makes the histogram for [Reconciler.Waits]. Times of creation are whole seconds, so it begins with one; checkpoints of machines that are
// not there wait for days, and are to be told from those that wait for an hour.
func NewWaits() prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "vmckpt_checkpoint_wait_seconds",
		Help:    "How long checkpoints waited from their creation until a node had them.",
		Buckets: []float64{1, 2, 5, 15, 60, 5 * 60, 15 * 60, 60 * 60, 6 * 60 * 60, 24 * 60 * 60, 7 * 24 * 60 * 60},
	})
}
