package agent

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/vmckpt/vmckpt/node-agent/capture"
)

// Metrics are what an agent counts, in base units.
type Metrics struct {
	captures        *prometheus.CounterVec
	restores        *prometheus.CounterVec
	refused         *prometheus.CounterVec
	pauses          *prometheus.HistogramVec
	captureSeconds  *prometheus.HistogramVec
	restoreSeconds  prometheus.Histogram
	storedBytes     prometheus.Counter
	witness         *prometheus.CounterVec
	waiting, active prometheus.Gauge
}

// NewMetrics makes them; Collectors are to be registered.
func NewMetrics() *Metrics {
	seconds := []float64{.1, .25, .5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000}
	return &Metrics{
		captures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vmckpt_captures_total", Help: "Captures that came to an end, by kind of image (base, increment) and result (ok, or the error's code).",
		}, []string{"kind", "result"}),
		restores: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vmckpt_restores_total", Help: "Restores that came to an end, by result (ok, or the error's code).",
		}, []string{"result"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vmckpt_status_refused_total", Help: "Statuses that the API server refused for another reason than that of a busy one, by kind of object.",
		}, []string{"kind"}),
		pauses: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "vmckpt_capture_pause_seconds",
			Help:    "How long guests stood still for captures, one observation a pause, by what for (instant, barrier).",
			Buckets: []float64{.001, .002, .003, .005, .0075, .01, .015, .02, .03, .05, .1, .2, .5, 1, 5},
		}, []string{"for"}),
		captureSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "vmckpt_capture_duration_seconds", Help: "How long captures took, by kind of image.", Buckets: seconds,
		}, []string{"kind"}),
		restoreSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "vmckpt_restore_duration_seconds", Help: "How long restores took.", Buckets: seconds,
		}),
		storedBytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "vmckpt_capture_stored_bytes_total", Help: "Bytes that captures added to volumes.",
		}),
		witness: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "vmckpt_capture_witness_total",
			Help: "Captures that asked for KVM's dirty log, by what it said: agreed; missed (the page tables missed a write); nested (more, for guests of the guest); none (it could not be compared).",
		}, []string{"result"}),
		waiting: prometheus.NewGauge(prometheus.GaugeOpts{Name: "vmckpt_queue_waiting", Help: "Tasks that wait on this node."}),
		active:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "vmckpt_queue_running", Help: "Tasks that are worked on on this node."}),
	}
}

// Collectors returns all of them.
func (m *Metrics) Collectors() []prometheus.Collector {
	return []prometheus.Collector{m.captures, m.restores, m.refused, m.pauses, m.captureSeconds, m.restoreSeconds, m.storedBytes, m.witness, m.waiting, m.active}
}

func (m *Metrics) queue(waiting, running int) {
	m.waiting.Set(float64(waiting))
	m.active.Set(float64(running))
}

func (m *Metrics) captured(kind string, r *capture.Result) {
	m.captures.WithLabelValues(kind, "ok").Inc()
	m.captureSeconds.WithLabelValues(kind).Observe(r.Duration.Seconds())
	m.storedBytes.Add(float64(r.Pages.WrittenBytes))
	if w := r.Witness; w != nil {
		result := "agreed"
		switch {
		case !w.Compared:
			result = "none"
		case w.Alarm():
			result = "missed"
		case w.Missed > 0:
			result = "nested"
		}
		m.witness.WithLabelValues(result).Inc()
	}
	for _, p := range r.Pauses {
		m.pauses.WithLabelValues(p.For).Observe(p.Total.Seconds())
	}
}
